"""The State of the Union addresses as a TFDS dataset. Importing this does not import TensorFlow.

`VERSION` stands here, and not in the builder, so that a token cache can be found by it cheaply.
"""

NAME = "state_of_the_union"
VERSION = "1.0.0"
