"""Stop a run whose loss or weights are no longer finite, all processes at once, and say where."""

import math

import torch

from engine import distributed


class DivergenceCheck:
    """Counts finite steps on the device; `has_diverged` is asked only where one waits anyway.

    Args:
        parameters: of the network. A gradient that is not finite shows in them, unless GradScaler
            skipped its step.
        first_step: of the epoch, from 0.
        device: that of the loss.
    """

    def __init__(self, parameters, first_step, device):
        self.parameters, self.first_step = list(parameters), first_step
        self.finite_steps = torch.zeros((), device=device)

    def count(self, sum_of_losses):
        """Count a step; sum_of_losses, of all steps up to it, stays NaN once one was."""
        self.finite_steps += sum_of_losses.isfinite()

    def has_diverged(self, sum_of_losses):
        """Whether the loss or a weight of this process is not finite; a scalar on the device."""
        if not self.parameters:
            return ~sum_of_losses.isfinite()
        norms = torch.stack(torch._foreach_norm(self.parameters, math.inf))
        return ~(sum_of_losses + norms).isfinite().all()

    def exit(self, epoch, step, steps, sum_of_losses, what_now):
        """End all processes with the sentence of the one that diverged first. All of them call it.

        Args:
            epoch, step: that was done last, from 0.
            steps: of an epoch.
            what_now: which checkpoint holds what, and what to try.
        """
        value = float(sum_of_losses)
        n_finite, value = min(distributed.all_gather_object((int(self.finite_steps), value)))
        failed = self.first_step + n_finite
        problem = f"the loss is {value}" if failed <= step else "a weight is not finite"
        distributed.exit_all_ranks(
            f"{problem} at epoch {epoch + 1}, step {min(failed, step) + 1} of {steps}; {what_now}"
        )
