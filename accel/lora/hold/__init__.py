"""LoRAs in memory, on the host and on the device, and their binding."""
