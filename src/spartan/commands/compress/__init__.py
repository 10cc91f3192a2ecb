"""`spartan compress`."""
