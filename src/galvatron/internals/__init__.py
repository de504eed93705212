"""Private names of PyTorch, transformers and torchao, all that are used, each behind a function of ours.

Takes public objects; gives what no public name gives.  Knows nothing of models, plans or processes.  A private name
may change in any release, so these were run (the tests of this project, ``make test`` and ``make test-lowest``) on

    torch          2.11.0, 2.13.0
    transformers   5.17.0, 5.23.0
    torchao        0.18.0

and pyproject.toml admits what lies between them.  What differed:

    FSDPState._fsdp_param_groups   2.13; 2.11 has one group and calls it _fsdp_param_group
"""

from __future__ import annotations

from torch._C._distributed_c10d import FileStore, HashStore, PrefixStore, Store, TCPStore
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .attention import (
    ATTENTION,
    attend,
    attend_backward,
    attend_by_bounds,
    attends_by_bounds,
)
from .hugging_face import (
    call_attention,
    called_attention,
    model_mapping,
    model_types,
    multiply_one_by_one,
    needless_names,
    record_layers_alone,
    to_be_initialised,
    without_value_checks,
)
from .modules import (
    hooks,
    is_compiled,
    keep_graphs,
    keep_made,
    leave_out_advice,
    made_value,
    noted_initialisers,
    put_buffer,
    put_parameter,
)
from .processes import (
    REDUCE_SCATTER,
    all_gather,
    all_to_all,
    arrived,
    default_store,
    exchange_rows,
    group_named,
    new_group,
    reduce_scatter,
)
from .sharding import (
    begin_backward,
    end_backward,
    forget_forwards,
    gathered_buffers,
    is_in_forward,
    local_part,
    materialise_shards,
    reduce_gradients,
    sharded_parameter,
    whole_gradient,
)
from .tensors import (
    changes_in_place,
    clear_cublas_workspaces,
    float8_product,
    has_tensor_hooks,
    is_in_backward,
    multiplies_in_float8,
    multiply_all_,
    norms,
    owned,
    storage_address,
    takes_generator,
    viewed,
)

__all__ = [
    "ATTENTION",
    "REDUCE_SCATTER",
    "FakeTensorMode",
    "FileStore",
    "HashStore",
    "PrefixStore",
    "Store",
    "TCPStore",
    "TorchDispatchMode",
    "all_gather",
    "all_to_all",
    "arrived",
    "attend",
    "attend_backward",
    "attend_by_bounds",
    "attends_by_bounds",
    "begin_backward",
    "call_attention",
    "called_attention",
    "changes_in_place",
    "clear_cublas_workspaces",
    "default_store",
    "end_backward",
    "exchange_rows",
    "float8_product",
    "forget_forwards",
    "gathered_buffers",
    "group_named",
    "has_tensor_hooks",
    "hooks",
    "is_compiled",
    "is_in_backward",
    "is_in_forward",
    "keep_graphs",
    "keep_made",
    "leave_out_advice",
    "local_part",
    "made_value",
    "materialise_shards",
    "model_mapping",
    "model_types",
    "multiplies_in_float8",
    "multiply_all_",
    "multiply_one_by_one",
    "needless_names",
    "new_group",
    "norms",
    "noted_initialisers",
    "owned",
    "put_buffer",
    "put_parameter",
    "record_layers_alone",
    "reduce_gradients",
    "reduce_scatter",
    "sharded_parameter",
    "storage_address",
    "takes_generator",
    "to_be_initialised",
    "tree_leaves",
    "tree_map_only",
    "viewed",
    "whole_gradient",
    "without_value_checks",
]
