# SPDX-License-Identifier: Apache-2.0
"""The path that configurations name; see `portakv.integrations.sglang.kvcacheio`."""

from portakv.integrations.sglang.kvcacheio import (
    copy_all_layer_kv_cache_cpu as copy_all_layer_kv_cache_cpu,
)
from portakv.integrations.sglang.kvcacheio import copy_to_gpu_no_ce as copy_to_gpu_no_ce
from portakv.integrations.sglang.kvcacheio import copy_tokens as copy_tokens
from portakv.integrations.sglang.kvcacheio import (
    get_device_accessible_ptr as get_device_accessible_ptr,
)
from portakv.integrations.sglang.kvcacheio import (
    transfer_embedding_ranges_direct as transfer_embedding_ranges_direct,
)
from portakv.integrations.sglang.kvcacheio import transfer_kv_all_layer as transfer_kv_all_layer
from portakv.integrations.sglang.kvcacheio import (
    transfer_kv_all_layer_direct_lf_pf as transfer_kv_all_layer_direct_lf_pf,
)
from portakv.integrations.sglang.kvcacheio import (
    transfer_kv_all_layer_lf_pf as transfer_kv_all_layer_lf_pf,
)
from portakv.integrations.sglang.kvcacheio import (
    transfer_kv_all_layer_lf_ph as transfer_kv_all_layer_lf_ph,
)
from portakv.integrations.sglang.kvcacheio import (
    transfer_kv_all_layer_mla as transfer_kv_all_layer_mla,
)
from portakv.integrations.sglang.kvcacheio import (
    transfer_kv_all_layer_mla_lf_pf as transfer_kv_all_layer_mla_lf_pf,
)
from portakv.integrations.sglang.kvcacheio import transfer_kv_direct as transfer_kv_direct
from portakv.integrations.sglang.kvcacheio import transfer_kv_per_layer as transfer_kv_per_layer
from portakv.integrations.sglang.kvcacheio import (
    transfer_kv_per_layer_direct_pf_lf as transfer_kv_per_layer_direct_pf_lf,
)
from portakv.integrations.sglang.kvcacheio import (
    transfer_kv_per_layer_mla as transfer_kv_per_layer_mla,
)
from portakv.integrations.sglang.kvcacheio import (
    transfer_kv_per_layer_mla_pf_lf as transfer_kv_per_layer_mla_pf_lf,
)
from portakv.integrations.sglang.kvcacheio import (
    transfer_kv_per_layer_pf_lf as transfer_kv_per_layer_pf_lf,
)
from portakv.integrations.sglang.kvcacheio import (
    transfer_kv_per_layer_ph_lf as transfer_kv_per_layer_ph_lf,
)
