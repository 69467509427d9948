"""Nodes that make every recompile in the server an error, and that show that it is one."""

import torch


class ProbeErrorOnRecompile:
    """From now on, whatever recompiles in this process raises."""

    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "execute", True, "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def execute(self):
        # Not `config.error_on_recompile = True`: that is a context variable, and each prompt has a context of its own.
        torch._dynamo.config._config["error_on_recompile"].default = True
        return {"ui": {"set": [True]}}


class ProbeRecompile:
    """Compiles a function for one size, then calls it with another: an error after ProbeErrorOnRecompile."""

    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "execute", True, "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"size": ("INT", {"default": 3})}}

    def execute(self, size):
        compiled = torch.compile(lambda tensor: tensor * 2, backend="eager", dynamic=False)
        compiled(torch.ones(size))
        compiled(torch.ones(size + 1))
        return {"ui": {"ran": [True]}}
