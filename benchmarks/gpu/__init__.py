"""One device, one command: is Galvatron right on it, does it keep its promises, and is it the fastest there?

    python -m benchmarks.gpu --out gpu.json

Seven questions, each with its share of the seconds; what does not fit into them is left out and said:

* ``modes``: does every way to run on one device give the losses and gradients of one CPU process in float32?
* ``predictions``: do plans take the time and memory that a profile made in the same run predicts?
* ``peers``: how fast is it beside other ways to train the same model at the same batch, in turns?
* ``ranks``: does rank 0 of plans for 8 and 64 devices take the memory predicted?
* ``parity``, ``mixes``: do plans of several ranks on the device equal one process: of one technique, and mixed?
* ``families``: are models of other kinds predicted right, and faster than transformers' own loop?

Without a GPU the same runs small on the CPU.
"""
