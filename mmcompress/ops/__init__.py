"""Pure tensor functions that the methods share: no model, no host synchronisation, static shapes."""
