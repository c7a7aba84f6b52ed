"""What runs beside the base model: layouts, slabs, the fused step, rollouts, the Ray actors.

Tensors carry shape suffixes, one letter per axis: `x_TD` is [rows, hidden]. In all of `workers/`:

    A  adapters of a pass            L  layers with experts
    B  sequences attended together   M  padded length of a sequence
    C  rows of a chunk               N  target tokens, whose log-probability is wanted
    D  inputs, or the hidden width   P  elements of an adapter's flat buffer
    E  experts                       Q  copies of rows for their experts, as sent
    F  outputs                       R  rank
    G  groups of what they stand by  S  slots
    H  query heads                   T  rows of a pass
    I  inner width of an expert      U  all sequences of a rollout
    J  shards of a group             V  vocabulary
    K  experts per token             W  key/value heads, or a block's width
    O  gate and up together, 2 I     X  width of a head
    Y  rows in the order of experts  Z  copies of rows, as received

A digit is a fixed size: `place_I5` has rows of five.
"""
