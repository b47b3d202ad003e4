"""Two networks learn with losses/ alone: put that folder beside this file, and run it."""

import torch
from torch.nn import functional as F

from losses import Contrast
from losses.ring import Ring

torch.manual_seed(0)
images = torch.randn(256, 32)  # stand for a data set: image i is row i
encoder, key_encoder = torch.nn.Linear(32, 16), torch.nn.Linear(32, 16)
optimizer = torch.optim.SGD([*encoder.parameters(), *key_encoder.parameters()], lr=1.0)
loss_fn = Ring(epochs=6, temperature=0.2)
for epoch in range(6):
    for index in torch.randperm(256).split(64):
        views = [images[index] + 0.1 * torch.randn(64, 32) for _ in range(2)]
        q, k = F.normalize(encoder(views[0])), F.normalize(key_encoder(views[1]))  # (N, D) each
        own = torch.arange(64)  # a query's own key is no negative of it
        contrast = Contrast(q, k[:, None], k, index, index, self_index=own)
        loss = loss_fn(contrast, float(epoch)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1} loss {loss.item():.3f}")
