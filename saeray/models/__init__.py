"""Language models that ship with saeray."""
