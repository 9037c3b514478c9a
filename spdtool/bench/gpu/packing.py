"""Remove padding before the first layer of a fused graph, and put it back behind the last one.

Between the two all tokens of a batch stand in one row [tokens, hidden], and PackedAttention keeps
the rows apart. The operators exist in onnxruntime's CUDA provider only. See
`export.graph.row_lengths` for the input that they need.
"""

from __future__ import annotations

import onnx
from onnx import helper

from spdtool.errors import ModelError
from spdtool.export.graph.fuse import FUSED_DOMAIN
from spdtool.export.graph.protobuf import rename_inputs, replace_items
from spdtool.export.graph.row_lengths import ROW_LENGTHS, remove_dead_nodes

NORMALIZATIONS = ("LayerNormalization", "SkipLayerNormalization")
SHARED_ATTRIBUTES = ("num_heads", "qkv_hidden_sizes", "scale")  # of Attention and PackedAttention
TOKENS, OFFSETS, ROW_STARTS, LONGEST = "packed/tokens", "packed/offsets", "packed/row_starts", "packed/longest"
PACKED_RESULT = "packed/result"


def pack_rows(proto: onnx.ModelProto) -> None:
    """Let the layers of a graph compute real tokens only.

    Raises:
        ModelError: its attention does not take row lengths.
    """
    nodes = list(proto.graph.node)
    attentions = [node for node in nodes if (node.domain, node.op_type) == (FUSED_DOMAIN, "Attention")]
    if not attentions or not any(ROW_LENGTHS in node.output for node in nodes):
        raise ModelError("padding cannot be removed: its attention does not take the length of each row")
    entry = attentions[0].input[0]
    last = [node for node in nodes if node.op_type in NORMALIZATIONS][-1]
    result = last.output[0]
    last.output[0] = PACKED_RESULT
    first = next(index for index, node in enumerate(nodes) if entry in node.input)
    end = nodes.index(last) + 1
    rename_inputs(nodes[first:end], {entry: TOKENS, result: PACKED_RESULT})
    for node in attentions:
        node.op_type = "PackedAttention"
        node.input[:] = [*node.input[:3], OFFSETS, ROW_STARTS]
        replace_items(node.attribute, [a for a in node.attribute if a.name in SHARED_ATTRIBUTES])
    removal = helper.make_node(
        "RemovePadding", [entry, ROW_LENGTHS], [TOKENS, OFFSETS, ROW_STARTS, LONGEST], domain=FUSED_DOMAIN
    )
    restoring = helper.make_node("RestorePadding", [PACKED_RESULT, OFFSETS], [result], domain=FUSED_DOMAIN)
    replace_items(proto.graph.node, [*nodes[:first], removal, *nodes[first:end], restoring, *nodes[end:]])
    remove_dead_nodes(proto.graph)
