"""A transformer that does not fit the device: what stays there, and what comes block by block."""
