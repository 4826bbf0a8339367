"""The outputs of recorded layers in the autograd graph: what takes them, and at which of them backward passes leave dL/dz."""

from torch import nn
from torch.autograd.graph import Node

from secondorder._tape.backward import BackwardLog
from secondorder._tape.graph import Marks
from secondorder._tape.records import LayerCall


class LayerOutputs(Marks):
    """The nodes of layers' outputs, marked with the calls that have made them.

    Args:
        key: of the calls in the nodes' metadata.
        log: collects the gradients.
    """

    def __init__(self, key: str, log: BackwardLog):
        super().__init__(key)
        self._log = log
        self._consumer: dict[nn.Linear, nn.Module] = {}  # what took each layer's output first: a layer, or the criterion
        self._several_consumers: set[nn.Linear] = set()

    def call_at(self, output: Node) -> LayerCall:
        """Returns the call that has made an output."""
        call: LayerCall = self.at(output)
        return call

    def use(self, output: Node, consumer: nn.Module) -> LayerCall:
        """Notes that a layer or the criterion takes the output of a call; returns the call."""
        call = self.call_at(output)
        if self._consumer.setdefault(call.layer, consumer) is not consumer:
            self._several_consumers.add(call.layer)
        if call.used or call.layer in self._several_consumers:
            self.keep_gradient(output)
        call.used = True
        return call

    def keep_gradient(self, output: Node) -> None:
        """Has backward passes leave dL/dz at the call that has made an output."""
        call = self.call_at(output)
        if not call.keeps_gradient:
            call.keeps_gradient = True
            self._log.collect(call, "grad_output", output, 0)

    def keep_gradients_of(self, calls: set[LayerCall], loss: Node) -> None:
        """Has backward passes leave dL/dz at these calls upstream of a loss, and from now on at all calls of their layers."""
        self._several_consumers |= {call.layer for call in calls}
        for output in self.upstream(loss):
            if self.call_at(output) in calls:
                self.keep_gradient(output)
