"""A CUDA device that is not there, so that faults of device, dtype, memory and synchronisation show on a CPU.

    with imitated(capability=(7, 5)) as card:
        ...  # torch sees cuda:0, a T4; perce_lite, transformers, trl, peft and bitsandbytes run on it

`CardTensor` is a wrapper whose Python `.device` is cuda:0, over a tensor of the CPU (values), or of meta for floating
numbers (`shapes=True`: an 8B takes no memory). In C++ its device is `lazy`, for which autograd needs no accelerator.

- An operation over tensors of both devices is an error, as on a GPU.
- Live bytes of the card's storages are counted with torch's rounding, and their peak; so are kernels, copies and
  synchronisations, with the place in the code that asked for them.
- Autocast and the choice of attention's kernel follow torch 2.13; the kernels' results come from plain arithmetic.

Why not `FakeTensorMode`: over "cuda" the first operation that wants a gradient aborts the whole process in a CPU build
of torch 2.13 ("PyTorch is not linked with support for cuda devices"), a `Params4bit` cannot hold a fake tensor, and
every `.item()` and boolean index is refused. The meta device alone has no memory
to count and knows nothing of two devices.

What it cannot do: a device by its bare number (`torch.device(0)` asks C++). What it cannot show: speed, the driver's
own memory, what the allocator loses, numbers in the last bits of a GPU.

The tests run every path on it (`tests/imitated_card`), `perce-lite plan --imitate` a step of a recipe.
"""
