"""Compiles for TPUs without one, and models the time of what comes out.

The TPU compiler, libtpu, runs anywhere; it lays out a program completely, down to what is issued in
each cycle. So the time of a kernel can be found by executing that by hand, as far as it decides
anything:

  topology       the devices of a slice, to lower for         ("v5e:4x4" -> jax.Device)
  kernel_cost    `Case` -> `ProgramCost`, `KernelCost` or `Refusal`; the rest is behind it
  worker         the process that compiles, with libtpu's flags set before it is loaded
  hlo, loops     the schedule: operations, constants, how often loops run
  schedule       replays it: operations one after the other, copies and collectives in the background
  collectives    which operations begin, carry on and await collectives
  network        which axes and links these take, and how long
  bundles        one operation's VLIW bundles, read from the text that libtpu writes
  translate      their scalar instructions as Python functions, a straight run each
  machine        executes those: cycles, DMAs, use of the units
  chips          clocks, peaks, bandwidths

How time is modelled. A bundle takes a cycle: the compiler knows the latencies of everything on the
core and has put empty bundles where it must wait. Loops, branches and predicates are executed, with
the tables that choose a kernel's blocks taken from the program's constants. DMAs get 93% of the
published bandwidth of HBM in turn and arrive 370 ns later; a wait stalls for what is left. If a value
is needed that the program would compute from data, it is guessed to be 0, and the cost says so
(`guesses`, `is_exact`): give the program constants instead.

How far off it is. Nobody has run this repository on a TPU; these are others' measurements (v5e: JAX's
documentation of matrix products; `tests/aot/test_kernel_cost.py` holds them and the model to each
other), with the dispatch of 0.105 ms taken off:

  XLA, 8192^3 and 4096^3 bfloat16             5.94, 0.722 ms     modelled  5.83 (-2%), 0.765 (+6%)
  Pallas, blocks 512 x 1024 x 1024            5.99, 0.784 ms     modelled  5.89 (-2%), 0.749 (-4%)
  Pallas, blocks 128 x 128 x 128, 4096^3      11.77 ms           modelled  10.52 (-11%)

Large blocks: within 6%. Small blocks, which live by the latency of DMAs (fitted to the last line),
may be off by some tens of percent. Of v6e and v5p there is hardly anything to compare with, of
TPU7x nothing: take those for ratios. Compare like with like, on one chip, from one compiler.

Collectives take the time that their bytes need on the links of the slice, at 90% of the published
bandwidth, and a microsecond a hop. Those that start early go on behind operations, and wait for others on
the same links; what is waited for is `ProgramCost.exposed_seconds`. Nothing of this was compared with a
measurement of its own.

What is not modelled: what collectives take of HBM and of the core's slots, links that are shared by chance
(groups count as evenly spread), transfers to and from the host's memory
(`ProgramCost.not_modelled` names such things), the SparseCores, the start of a program and of each
operation in it, contention of HBM's banks and the cost of short strides, throttling; of a loop's operations
all turns but the first, of a conditional all branches but the costliest.
"""
