"""The only place that knows gRPC and asyncio together."""
