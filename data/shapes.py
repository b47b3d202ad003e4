"""shapes: twelve forms, drawn by code. The data set for a first run, for CPUs and for tests; nothing to download.

An image is one form of its class, brighter than the textured background and the clutter on it. Only the form tells the class: colour,
position, size, rotation, mirroring, texture and clutter vary freely inside every class, so that neither raw pixels nor an untrained
encoder get far. Chance is 8.3 %. On 10,000 training and 2,400 test images, kNN (k 200) reads 29 % from raw pixels and 13 % from an
untrained width-16 ResNet-10; that network trained with all labels (cross-entropy, crop and flip, 12 epochs) reaches 97 %.

Deterministic: the same seed, number and size give the same images.
"""

import numpy as np

CLASSES = [
    "disc",
    "ring",
    "crescent",
    "half-disc",
    "triangle",
    "square",
    "star",
    "plus",
    "L",
    "T",
    "arrow",
    "Z",
]


def regular(corners, radii=(1.0,)):
    """A regular polygon; with two radii, a star."""
    n = corners * len(radii)
    angle = 2 * np.pi * np.arange(n) / n
    radius = np.resize(radii, n)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


POLYGONS = {  # corners (E, 2) in the form's own frame, about the unit disc
    "triangle": regular(3, (1.15,)),
    "square": regular(4, (1.05,)),
    "star": regular(5, (1.15, 0.45)),
    "plus": np.array(
        [
            (-0.3, -1),
            (0.3, -1),
            (0.3, -0.3),
            (1, -0.3),
            (1, 0.3),
            (0.3, 0.3),
            (0.3, 1),
            (-0.3, 1),
            (-0.3, 0.3),
            (-1, 0.3),
            (-1, -0.3),
            (-0.3, -0.3),
        ]
    ),
    "L": np.array([(-0.7, -1), (-0.1, -1), (-0.1, 0.4), (0.8, 0.4), (0.8, 1), (-0.7, 1)]),
    "T": np.array(
        [
            (-0.9, -0.9),
            (0.9, -0.9),
            (0.9, -0.3),
            (0.3, -0.3),
            (0.3, 1),
            (-0.3, 1),
            (-0.3, -0.3),
            (-0.9, -0.3),
        ]
    ),
    "arrow": np.array(
        [(1.1, 0), (0.1, -0.9), (0.1, -0.3), (-1, -0.3), (-1, 0.3), (0.1, 0.3), (0.1, 0.9)]
    ),
    "Z": np.array(
        [
            (-0.9, -0.9),
            (0.35, -0.9),
            (0.35, 0.35),
            (0.9, 0.35),
            (0.9, 0.9),
            (-0.35, 0.9),
            (-0.35, -0.35),
            (-0.9, -0.35),
        ]
    ),
}


def distance(name, x, y):
    """Signed distance from points (x, y), any shape, to the edge of a form, negative inside. Units: the form's radius is about 1."""
    r = np.hypot(x, y)
    if name == "disc":
        return r - 1
    if name == "ring":
        return np.abs(r - 0.75) - 0.27
    if name == "crescent":
        return np.maximum(r - 1, 0.85 - np.hypot(x - 0.5, y))
    if name == "half-disc":
        return np.maximum(np.hypot(x + 0.4, y) - 1.1, -x - 0.4)
    corners = POLYGONS[name]
    nearest, inside = np.full(x.shape, np.inf, np.float32), np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0)):
        dx, dy = bx - ax, by - ay
        t = np.clip(
            ((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1
        )  # nearest point of the edge
        nearest = np.minimum(nearest, np.hypot(x - ax - t * dx, y - ay - t * dy))
        if dy:  # does a ray to the right cross the edge?
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * (dx / dy))
    return np.where(inside, -nearest, nearest)


def draw(labels, size, rng):
    """Labels (n,) -> images (n, 3, size, size) uint8."""
    n = len(labels)
    u = lambda low, high, *shape: rng.uniform(low, high, (n, *shape)).astype(np.float32)
    col = lambda v: v[:, None, None]  # (n,) -> (n, 1, 1)
    y, x = np.meshgrid(
        *[(np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1] * 2, indexing="ij"
    )  # (S, S) in [-1, 1]
    x, y = x[None], y[None]

    # background: two dark colours, mixed by a sum of three waves of random direction and frequency
    wave = np.zeros((n, size, size), np.float32)
    for _ in range(3):
        angle, frequency = u(0, 2 * np.pi), u(0.5, 7)
        wave += np.sin(
            col(frequency) * (col(np.cos(angle)) * x + col(np.sin(angle)) * y)
            + col(u(0, 2 * np.pi))
        )
    wave = (wave / 3 * col(u(0.2, 1)) + 1)[:, None] / 2  # (n, 1, S, S) in [0, 1]
    image = u(0, 0.5, 3, 1, 1) * (1 - wave) + u(0, 0.5, 3, 1, 1) * wave  # (n, 3, S, S)

    def paint(image, d, colour):  # d in units of the image's half width; edges one pixel soft
        cover = np.clip(0.5 - d * size / 2, 0, 1)[:, None]
        return image + (colour - image) * cover

    for _ in range(4):  # clutter: strokes behind it, dark and bright
        px, py, angle, length, width = u(-1, 1), u(-1, 1), u(0, np.pi), u(0, 0.4), u(0.02, 0.06)
        along = (x - col(px)) * col(np.cos(angle)) + (y - col(py)) * col(np.sin(angle))
        across = (y - col(py)) * col(np.cos(angle)) - (x - col(px)) * col(np.sin(angle))
        d = np.hypot(np.maximum(np.abs(along) - col(length) / 2, 0), across) - col(width)
        image = paint(image, d, u(0, 0.8, 3, 1, 1))

    # the form, in a brighter colour
    radius, angle, mirror = u(0.45, 0.7), u(0, 2 * np.pi), np.where(u(0, 1) < 0.5, -1, 1)
    room = 1.15 - radius  # the form may touch the border, hardly ever leave the image
    fx, fy = x - col(u(-1, 1) * room), y - col(u(-1, 1) * room)
    fx, fy = (
        (fx * col(np.cos(angle)) + fy * col(np.sin(angle))) / col(radius),
        (fy * col(np.cos(angle)) - fx * col(np.sin(angle))) / col(radius * mirror),
    )
    d = np.empty((n, size, size), np.float32)
    for label in np.unique(labels):
        d[labels == label] = distance(CLASSES[label], fx[labels == label], fy[labels == label])
    image = paint(image, d * col(radius), u(0.5, 1, 3, 1, 1))

    image = image + rng.normal(0, 0.03, image.shape).astype(np.float32)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def shapes(n, size=32, seed=0):
    """N images and their labels: (n, 3, size, size) uint8, (n,) int64, classes in equal shares and random order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % len(CLASSES))
    return np.concatenate(
        [draw(labels[i : i + 1000], size, rng) for i in range(0, n, 1000)]
    ), labels
