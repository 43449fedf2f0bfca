"""FlashHead inside vLLM, through vLLM's own extension points: see docs/guides/vllm.md.

plugin      vLLM calls it in each of its processes; registers the layers
options     the user's options, and the configurations that are refused at start
engine      the state that the layers of one engine share, and the requests of each batch
needs       what each request needs of its row of logits
layers      the output embedding in the index's order, and the layer that makes rows of logits
head, rows  those rows; neither imports vLLM
metrics     counters
"""
