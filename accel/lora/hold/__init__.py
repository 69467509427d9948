"""LoRAs in memory: on the host, on the device, and bound to a model."""
