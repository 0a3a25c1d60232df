"""Physics-informed nets: equations with known solutions, nets with fast derivatives, and optimizers."""
