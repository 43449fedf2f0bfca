"""FlashHead inside vLLM, through vLLM's own extension points: see docs/vllm.md.

plugin              what vLLM calls in each of its processes; registers the layers below
options, refusals   what the user asked for, and what is refused at start with a reason
engine              what the pieces of one engine share
request_processor   what each request of a batch needs of its row (needs), before each step
embedding           the output embedding in the order of an index, held once
logits_processor    the layer that turns hidden states into rows of logits
head, rows          those rows, from this project's heads; neither imports vLLM
"""
