"""A trained network by torch.hub, in any program and from any folder.

network = torch.hub.load(
    "PATH/OF/THIS/REPOSITORY", "resnet", weights="runs/NAME/backbone.pt", source="local"
)
transform = torchvision.transforms.Compose(
    [
        torchvision.transforms.Resize(network.resize),
        torchvision.transforms.CenterCrop(network.image_size),
        torchvision.transforms.ToTensor(),
        torchvision.transforms.Normalize(network.mean, network.std),
    ]
)
features = network(transform(image)[None])  # (1, F), F = network.features
"""

import sys

dependencies = ["torch", "torchvision", "numpy", "yaml"]

# The program that calls torch.hub may have packages of these names itself. It gets them back.
PACKAGES = "engine", "models"


def take_modules():
    """Take all modules of PACKAGES out of sys.modules, and return them by name."""
    names = [name for name in sys.modules if name.split(".")[0] in PACKAGES]
    return {name: sys.modules.pop(name) for name in names}


modules_of_caller = take_modules()
try:
    from engine.distributed import print_main
    from engine.weights import fill_backbone, read_backbone
    from models.resnet import LAYERS, ResNet
finally:
    take_modules()
    sys.modules.update(modules_of_caller)


def resnet(weights):
    """Build the ResNet whose weights a file holds, for inference.

    It is in evaluation mode, and its parameters want no gradient; to fine-tune it call
    `network.requires_grad_(True).train()`. It computes in fp32, whatever it was trained in.

    Args:
        weights: a run's backbone.pt or last.pt, of any model.backbone, stem and width; or a ResNet
            in another layout that engine/weights.py knows, such as torchvision's or moco's.

    Returns:
        A network of normalised images (b, 3, S, S), of which it makes pooled features (b, F). Its
        attributes are `features`, F; and what the file says of its images, as a backbone.pt does,
        and a last.pt if data.mean and data.std of its run are numbers or auto, each None where it
        says nothing: `mean` and `std`, of each channel, for images in [0, 1]; `resize`, the shorter
        side of an image in pixels; `image_size`, the side S of the central square that is cut out.

    Raises:
        ValueError: says what the file holds instead.
    """
    try:
        tensors, sentence, preprocessing = read_backbone(weights)
        network = ResNet(*architecture(weights, tensors))
        fill_backbone(weights, network, tensors)
    except SystemExit as refusal:  # which would end the program that calls this
        raise ValueError(str(refusal)) from None
    print_main(sentence)
    for name in ("mean", "std", "resize", "image_size"):
        setattr(network, name, (preprocessing or {}).get(name))
    return network.requires_grad_(False).eval()


def architecture(path, tensors):
    """Tell a ResNet by its tensors {torchvision's key: tensor}: its name, stem and width."""
    if "L.conv1.weight" in tensors:
        raise ValueError(
            f"{path} is of CMC, two networks for lightness and colour, and torch.hub gives one; "
            "build models.cmc.LabEncoder with the settings of its run, whose backbone takes the "
            "file by load_state_dict"
        )
    blocks = {tuple(key.split(".")[:2]) for key in tensors if key.startswith("layer")}
    stages = [stage for stage, _ in blocks]
    layers = [stages.count(f"layer{number}") for number in (1, 2, 3, 4)]
    is_bottleneck = "layer1.0.conv3.weight" in tensors
    for name, (block, layers_of_name) in LAYERS.items():
        if layers == layers_of_name and is_bottleneck == (block.expansion > 1):
            stem = "cifar" if tensors["conv1.weight"].shape[-1] == 3 else "imagenet"
            return name, stem, len(tensors["layer1.0.conv1.weight"])
    raise ValueError(
        f"{path} holds a ResNet of {layers} blocks, and this repository has {', '.join(LAYERS)}"
    )
