"""Memory of the host and of the device."""
