"""KVM for one or more VMs, and the policy around it."""
