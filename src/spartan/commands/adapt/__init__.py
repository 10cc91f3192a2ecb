"""`spartan adapt`."""
