"""Recording q, k and AM flow inside other libraries' models. Each module needs its own optional package."""
