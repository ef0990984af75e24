"""The ground floor: what every folder of the project may import."""
