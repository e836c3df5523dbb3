"""One visit to a GPU machine: pack what must travel, measure and check there."""
