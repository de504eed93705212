"""Which lists of modules are stacks of layers: each hands its states on to the next.

Takes a twin and the calls of its forward pass; gives the lists.
"""

from __future__ import annotations

import itertools

from torch import nn
from transformers import PreTrainedModel

from .ends import makers_of
from .towers import OwnWay, is_within
from .trace import Call, Trace


def stacks_of(model: PreTrainedModel, trace: Trace) -> tuple[list[nn.ModuleList], list[nn.ModuleList]]:
    """The lists of modules of a class, each of two matrices or more, that hand hidden states on; as they are called.

    And those whose states have no dim of samples: the patches of all images of a batch, one after the other.
    """
    called = {id(call.module): call for call in trace.calls}
    found = []
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2 or any(id(m) not in called for m in module):
            continue
        calls = [called[id(member)] for member in module]
        passes_on = all(_hands_on(trace, earlier, later) for earlier, later in itertools.pairwise(calls))
        passes_on &= len({call.argument.shape[-1] for call in calls}) == 1  # stages of growing width have own stacks
        if len({type(m) for m in module}) == 1 and passes_on and sum(p.dim() > 1 for p in module[0].parameters()) > 1:
            found.append(module)
    outer = [stack for stack in found if not any(stack is not other and is_within(stack, other) for other in found)]
    ordered = sorted(outer, key=lambda stack: trace.place(stack[0]))
    packed = [stack for stack in ordered if trace.of(stack[0]).argument.dim() < 3]  # [patches, H]
    if len(packed) == len(ordered):
        raise OwnWay("has no stack of equal layers")
    return [stack for stack in ordered if stack not in packed], packed


def _hands_on(trace: Trace, earlier: Call, later: Call) -> bool:
    """Whether a layer's output is the next one's input, as it is or changed by what has no parameters."""
    if later.argument is earlier.output:
        return True
    between = trace.calls[trace.place(earlier.module) + 1 : trace.place(later.module)]
    is_alone = all(call.name.startswith(later.name + ".") for call in between if list(call.module.parameters()))
    return is_alone and earlier.output.grad_fn in makers_of(later.argument)


def is_changed(trace: Trace, stack: nn.ModuleList) -> bool:
    """Whether a stack's states are changed between its layers."""
    calls = [trace.of(layer) for layer in stack]
    return any(later.argument is not earlier.output for earlier, later in itertools.pairwise(calls))
