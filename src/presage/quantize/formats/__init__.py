"""Quantised weights as files hold them, to and from `Canonical`: one file per format, exact to the bit.

Readers (`compressed_tensors`, `gptq`, `awq`) find the quantised modules of a checkpoint by their tensors and read them one by one;
`gguf_blocks` takes blocks apart. `compressed_tensors_writer` writes what calibrators make.
"""
