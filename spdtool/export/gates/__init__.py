"""The gates that every exported file must pass; `checked_export` exports a checkpoint and goes through them in order:

    operators   the file has only operators of the domains that its target names (`operators`)
    interface   its inputs, outputs and versions are those that clients expect (`interface`)
    files       configuration, tokenizer files and manifest are the checkpoint's, and nothing else is there (`files`)
    weights     every weight is the checkpoint's, position by position, up to its format's rounding (`weights`)
    logits      the file computes the checkpoint's logits on real rows, and on shapes from (1, 1) to
                the longest input, padded on either side, or on the right where the file takes row lengths (`logits`)
    folder      opened from disk as a stranger would, configuration, tokenizer, labels and padding are the
                checkpoint's (`folder`)
    score       read from texts through that folder, the file has the checkpoint's dev score, within the
                budget (`score`)

A bundle has a gate of its own: it is put together from what passed these (`bundle`).

Each gate returns what it measured, or raises a GateError.

Files with rounded weights are compared twice. Their logits are compared with those of the
checkpoint after it was filled with the rounded weights, which proves the arithmetic; where the
arithmetic is rounded as well, the float32 form of the file takes the file's place. Their score is
compared with that of the checkpoint as it is.
"""
