"""What can be seen of the gateway: request ids, metrics, recent requests, traces, logs.

The path of a request fills a Journey (`journey`); at its end the observers read it. What the gateway processes of a
node count lies in memory that they share (`rows`), so that each of them answers for all, and what a killed process had
counted is kept.
"""
