"""From a stack of adapters to one flat buffer."""
