"""The load generator of `tpdist bench`, and what it makes of its measurements.

load.py           requests at a given concurrency or rate, with the time of every token
session.py        a series of loads on one target
prompts.py        random prompts that no cache has seen, or those of a file
in_process.py     a node of this process, and the way to its engine
openai_server.py  any server with the OpenAI API; http.py and events.py are how it is read
report.py         latencies, throughput and failures of one load point
roofline.py       the part of the memory bandwidth that decoding uses; read_rate.py measures it in a child
plot.py           latency against load, as SVG
"""
