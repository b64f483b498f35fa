"""Exit gates: the price of skipping a block, gates that predict it, and the threshold that a budget allows. In reading
order:

places     the feed-forward blocks that can have a gate
record     inputs, outputs and gradients of these blocks on the text
solve      of one block: substitute, prices, gate
threshold  one price limit for all blocks, chosen on held-out text
add        all of it, for one model
"""
