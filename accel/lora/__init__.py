"""LoRAs: from a file, or another program's patches, to tensors that a model's linears compute with.

The way of one LoRA:

    file            read.stream reads it, read.keys finds what every key is for, kinds.check_change checks its shapes
      │ read_lora
      ▼
    Adapter         kinds.convert made layers of its values: what it does to each linear, bias and norm; unscaled
      │ LoraStack.with_lora, ScheduledStack.with_lora
      ▼
    LoraStack       Adapters in order, each at a strength; what a MODEL carries. Nothing is computed yet
      │ pack.flat.flatten
      ▼
    FlatLora        one buffer in host memory: strengths folded in, ranks concatenated, in the transformer's dtype
      │ hold.device.DeviceLoras.upload
      ▼
    Bindings        views of that buffer's copy on the device, one for each linear
      │ hold.slots.LoraSlots.bind
      ▼
    slots           what the operators of `linear` read when they run; compiled code sees no change

`hold.library.LoraLibrary` walks this way for an engine and keeps each station's results: files, prepared stacks, stacks
on the device. A kind of LoRA is one module of `kinds`.
"""
