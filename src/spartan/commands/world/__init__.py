"""`spartan world`."""
