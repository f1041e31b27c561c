"""The keys of gRPC metadata that services and clients tell each other things under.

In a module that imports nothing: a client is no server, and must not load one to start.
"""

from __future__ import annotations

from typing import Final

# Trailing metadata of every answer: one lifetime of the service. Not initial metadata,
# which is a message of its own: 140 us of a call that takes 740 with it.
INCARNATION_KEY: Final = "gmem-incarnation"
# The journal that keeps the replies, where the service has one: it may outlive many
# incarnations, and a request may be repeated into any of them.
JOURNAL_KEY: Final = "gmem-journal"
# Initial metadata of a call with a stream of requests: the first one is accepted, and
# the others may come. Where it is missing the status comes next: grpc.aio loses the
# status of a call that ends while something is being written to it.
GO_KEY: Final = "gmem-go"
# Metadata of a repeated request: the journal, or else the lifetime, that it first met.
EXPECT_INCARNATION_KEY: Final = "gmem-expect-incarnation"
