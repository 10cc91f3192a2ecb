"""`spartan report`."""
