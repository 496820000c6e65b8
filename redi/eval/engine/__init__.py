"""See the map in redi.eval."""
