"""virt/kvm/guest_memfd.c as a service: inodes, their bytes and their files."""
