"""What somebody needs who tests a VMM: whole emulated hosts, fixtures, conformance."""
