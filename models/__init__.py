"""Encoders, and the hosts around them: a host says who is contrasted with whom, a loss says how.

The hosts are ir.py, cmc.py, moco.py and simclr.py; any loss runs on any of them.

**To add a host**, write models/x.py with a class X (in any capitals), and choose it by
`model: {host: x}` in a YAML. The other hosts are examples; simclr.py is the shortest. A host is an
nn.Module:

    __init__(...)
        Its keyword-only arguments are its YAML keys: their defaults and annotated types count. It
        may also ask for these, by name and without `*`: encoder, which it uses and does not keep;
        n_data, the number of images.
    n_views
        How many views of each image it wants.
    n_keys
        M, how many keys each of its queries has.
    forward(encoder, views: list[Tensor], index: Tensor) -> list[Contrast]
        views: n_views of (N, 3, S, S), of the same N images; index: (N,), which images. encoder is
        the network that learns, wrapped in DistributedDataParallel where there are several
        processes, and is called once. The losses of all contrasts are summed.
    update_memory()
        Called after the optimizer's step, for the backward pass needs the memory as it was.

and where it needs to

    pending
        What update_memory has yet to take in, a list. A host that has it can take a batch in parts
        (optim.accumulate); without it the negatives are the batch itself.
    Encoder
        The class of an encoder of its own, a models.resnet.Encoder (CMC: two networks).
    key_encoder
        The network that embeds all images for IFND's clusters, where it is not the one that learns.

All state is parameters and buffers, so that a checkpoint holds the whole of it.
"""
