"""Does a pass keep its whole contract, on one module or on graphs that hypothesis draws?"""
