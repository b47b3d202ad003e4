"""From settings to the parts of a run. What cannot work together is refused before training."""

import functools
import os
from typing import NamedTuple

import torch

from data.datasets import find_obstacle, load
from data.image_files import say_if_dark
from data.loader import Loader
from data.statistics import is_auto, replace_auto, say_if_grey
from engine import config, distributed
from engine.progress import progress
from engine.schedule import Schedule, sgd
from engine.weights import carried_statistics
from evaluation.features import KNN, embeddings, labelled_parts
from evaluation.unlabelled import Unlabelled
from losses.together import Together
from models.checks import check_batch
from models.resnet import Encoder

from .run import Run
from .train_on import goes_on_longer


class Datasets(NamedTuple):
    """The parts of a data set: what is trained on, and what evaluation takes."""

    pretrain: object
    train: object
    test: object  # None where there is no test part

    def labels(self, device):
        """The labels (n_data,) of what is trained on, on a device; None where there are none."""
        labels = self.pretrain.labels
        return None if labels is None else labels.to(device)

    @property
    def obstacle(self):
        """Why they allow no evaluation, or None."""
        return find_obstacle(self.train, self.test)


class Monitor(NamedTuple):
    """What an encoder is asked while it is trained: kNN, and figures that need no labels."""

    knn: KNN
    unlabelled: Unlabelled

    def due(self, epoch, epochs):
        """After `epoch` epochs of `epochs`?"""
        every = self.knn.every
        return every > 0 and (epoch % every == 0 or epoch == epochs)

    def __call__(self, encoder):
        """The figures for the log; none where neither is possible. All processes call it."""
        figures = {}
        if self.knn.possible:
            figures = {"knn": self.knn(encoder), "knn voters": self.knn.voters}
        return figures | self.unlabelled(encoder)


class Builder:
    """Builds the parts of a run: build("optim", Schedule) calls it with its section's settings.

    What the target refuses by ValueError ends the program, with the file's and section's name.

    Args:
        settings: the resolved settings of the file.
        file: its name.
    """

    def __init__(self, settings, file):
        self.settings, self.file = settings, file

    def __call__(self, section, target, **given):
        """target(**given, and those keys of the section that it names)."""
        return config.build(target, self.settings[section], f"{self.file}: {section}", **given)

    def run(self, fresh):
        """The Run of pre-training in runs/<name>, which may be trained on for more epochs.

        fresh: start over, though there is a checkpoint.
        """
        return self(
            "log",
            Run,
            folder=os.path.join("runs", self.settings["name"]),
            settings=self.settings,
            epochs=self.settings["optim"]["epochs"],
            fresh=fresh,
            train_on=goes_on_longer,
        )

    def dataset(self, part):
        """One part of the data; the numbers that `auto` comes to are kept in the settings."""
        settings = self.settings["data"]
        given = {key: settings[key] for key in ("image_size", "workers")}
        dataset = self("data", load, part=part, seed=self.settings["seed"], **given)
        if dataset is not None:
            replace_auto(settings, dataset.mean, dataset.std)
        return dataset

    def datasets(self, device, run):
        """The Datasets of section data; in memory, on `device`, where they are augmented there.

        run: a Run; where it goes on, `auto` is what it was at its start.
        """
        settings = self.settings["data"]
        if is_auto(settings):
            replace_auto(settings, **run.saved_statistics())
        pretrain = self.dataset("pretrain")
        # What evaluates must not replace an unreadable image, whose label would be another's.
        is_shared = settings["split"] == "train" and settings["on_error"] == "stop"
        train = pretrain if is_shared else self.dataset("train")
        test = self.dataset("test")
        if settings["augment_backend"] == "batched":
            for dataset in (pretrain, train, test):
                if dataset:
                    dataset.to(device)
        say_if_dark(pretrain)
        self("data", say_if_grey, dataset=pretrain)
        return Datasets(pretrain, train, test)

    def take_statistics(self, weights):
        """Normalise by the numbers that weights were trained with, where the settings say `auto`.

        Weights that carry none, as other people's, leave `auto`, which is measured then.

        Args:
            weights: a file, or "none".
        """
        settings = self.settings["data"]
        if weights == "none" or not is_auto(settings):
            return
        carried = carried_statistics(weights)
        replace_auto(settings, **carried)
        if not is_auto(settings):
            distributed.print_main(
                f"data.mean={settings['mean']} data.std={settings['std']}, with which {weights} "
                "was trained"
            )

    def host(self, dataset, device):
        """The encoder and the host around it."""
        host_class = config.method_class(self.settings["model"], "model")
        encoder = self.encoder(dataset, device)
        host = self("model", host_class, encoder=encoder, n_data=len(dataset))
        return encoder, host.to(device)

    def encoder(self, dataset, device):
        """The encoder, which normalises images by the data set's mean and std."""
        host_class = config.method_class(self.settings["model"], "model")
        encoder_class = getattr(host_class, "Encoder", Encoder)  # CMC brings its own
        return self("model", encoder_class, device=device, mean=dataset.mean, std=dataset.std)

    def loss(self, dataset, host, device):
        """The loss, or several of them together."""
        given = {
            "epochs": self.settings["optim"]["epochs"],
            "n_data": len(dataset),
            "n_keys": host.n_keys,
            "labels": dataset.labels,
        }
        file = f"{self.file}: loss"
        losses = [
            config.build(config.method_class(settings, "loss"), settings, file, **given)
            for settings in config.loss_settings(self.settings["loss"])
        ]
        for loss in losses:
            # IFND's clusters take a while.
            if hasattr(loss, "progress"):
                loss.progress = clustering_progress
        loss_fn = losses[0] if len(losses) == 1 else config.build(Together, {}, file, losses=losses)
        return loss_fn.to(device)

    def optimizer(self, encoder, device):
        """SGD, its schedule, and the scaler of fp16's losses, which else does nothing."""
        schedule = self("optim", Schedule)
        optimizer = self("optim", sgd, parameters=encoder.parameters(), lr=schedule.lr)
        return optimizer, schedule, loss_scaler(encoder, optimizer, device)

    def loader(self, dataset, host, encoder, schedule, device):
        """The Loader of the training images' views."""
        given = {
            "dataset": dataset,
            "batch_size": schedule.batch_size,
            "n_views": host.n_views,
            "seed": self.settings["seed"],
            "device": device,
        }
        file = f"{self.file}: optim"
        loader = config.build(Loader, self.settings["data"], file, **given)
        parts = self.settings["optim"]["accumulate"]
        config.build(
            check_batch,
            {},
            self.file,
            key="optim.batch_size",
            batch_size=loader.batch,
            processes=distributed.world_size(),
            bn_splits=encoder.bn_splits,
            accumulate=parts,
        )
        if parts > 1 and not hasattr(host, "pending"):
            raise SystemExit(
                f"{file}.accumulate is {parts}, but the negatives of "
                f"{self.settings['model']['host']} are the batch itself, which cannot be taken in "
                "parts; take a smaller batch_size, more processes, or a host with a memory"
            )
        return loader

    def monitor(self, datasets, loader, device):
        """The Monitor of section knn."""
        settings, seed = self.settings["data"], self.settings["seed"]
        given = {"own": datasets, "settings": settings, "seed": seed}
        train, test, source = self("knn", labelled_parts, **given)
        if source and settings["augment_backend"] == "batched":
            train.to(device)
            test.to(device)
        knn = self(
            "knn",
            KNN,
            train=train,
            test=test,
            image_size=settings["image_size"],
            device=device,
            workers=loader.workers,
            source=source,
        )
        return Monitor(knn, self("knn", Unlabelled, loader=loader))

    def embedder(self, encoder, host, dataset, loader):
        """A function without arguments: the embeddings of all images, by the key encoder if any."""
        key_encoder = getattr(host, "key_encoder", encoder)
        size = self.settings["data"]["image_size"]
        return functools.partial(
            embeddings, key_encoder, dataset, size, loader.device, loader.workers
        )

    @staticmethod
    def compile(encoder, host):
        """torch.compile the networks: the first step takes a minute, the others a few % less."""
        encoder.backbone.compile()
        if hasattr(host, "key_encoder"):
            host.key_encoder.net.backbone.compile()


def clustering_progress(total, desc):
    """Show how far k-means is. The losses give tqdm's arguments."""
    return progress(description=desc, total=total)


def loss_scaler(encoder, optimizer, device):
    """torch's GradScaler, which does something for fp16 only."""
    scaler = torch.amp.GradScaler(device.type, enabled=encoder.precision == "fp16")
    if scaler.is_enabled():
        # It may skip the first step, which would leave the momentum of a fused SGD uninitialised.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return scaler
