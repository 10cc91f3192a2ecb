"""`spartan train`."""
