"""One address before several servers of one model: each a process, each with its engine and its cache.

    client ─► guard ─► routing: who has the prompt's beginning ─► relay ─► replica's socket
                                                                    └ lost before it answered: another replica

routing   which replica a request goes to              replicas  starts them, and those that are lost again
exchange  HTTP over a replica's socket                 replica   the program that each of them is
relay     a request's way there and back               merged    many metrics and experts' counts as one
app       the routes
"""
