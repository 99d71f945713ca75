"""Between the stages of a model whose layers are divided: hidden states from each stage to the next.

The first rank is the last stage. It has the requests: tokens are drawn where they are read, and none has to
travel back: a sequence goes on in a step that begins with a token the host has seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backbench.backends.torch.collectives import TorchCommunicator
from backbench.engine.models.decoder import Decoder
from backbench.engine.models.layers import Stage


def stage_of(rank: int, count: int) -> Stage:
    """The stage of a rank; its neighbours in rank, round the end, are its neighbours."""
    return Stage((rank - 1) % count, count)


class Pipe:
    """One stage's ends. Every stage passes on every step, in the same order; calls are no part of a graph."""

    def __init__(self, decoder: Decoder, communicator: TorchCommunicator, max_tokens: int) -> None:
        """All stages open theirs at once, and pass one row on: what a library sets up then is taken before
        memory is measured."""
        self.first = decoder.spec.first
        self.last = decoder.spec.last
        self.num_stages = communicator.world
        self.served_by = communicator.library
        self.hidden = decoder.new_hidden(max_tokens)
        """[max_tokens, H] of the step the device is at: what has come, or what is to go."""
        self._communicator = communicator
        self.receive(1)
        self.send(1)
        if self.hidden.is_cuda:
            torch.cuda.synchronize(self.hidden.device)

    def entering(self, num_tokens: int) -> Tensor | None:
        """What came for a step, [num_tokens, H]; None on the first stage."""
        return None if self.first else self.hidden[:num_tokens]

    def leave(self, hidden: Tensor) -> None:
        """Have `hidden` [T, H] ready to be sent."""
        self.hidden[: len(hidden)].copy_(hidden)

    def receive(self, num_tokens: int) -> None:
        """Fill the first rows with what the stage before sends; nothing on the first stage."""
        if not self.first:
            rank, world = self._communicator.rank, self._communicator.world
            self._communicator.recv(self.hidden[:num_tokens], (rank - 1) % world)

    def send(self, num_tokens: int) -> None:
        """Give the first rows to the next stage; nothing on the last stage."""
        if not self.last:
            rank, world = self._communicator.rank, self._communicator.world
            self._communicator.send(self.hidden[:num_tokens], (rank + 1) % world)
