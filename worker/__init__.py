"""The running program: pipeline file in, processes and batches inside, clean exit."""
