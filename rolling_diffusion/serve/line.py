"""The line before the model: whoever comes first is drawn first, and everyone knows the own place."""

from __future__ import annotations

import asyncio

from .errors import full


class Line:
    """Tickets in the order of arrival. The first one is at the model; at most `most` stand in line, that one included.

    Lives in one event loop.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.tickets: list[Ticket] = []

    def __len__(self) -> int:
        return len(self.tickets)

    def join(self) -> Ticket:
        """A place at the end; Refusal if there is none left."""
        if len(self.tickets) >= self.most:
            raise full(self.most)
        ticket = Ticket(self)
        self.tickets.append(ticket)
        return ticket


class Ticket:
    """A place in line, until it is left."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.moved = asyncio.Event()

    @property
    def place(self) -> int:
        """How many stand before; 0 at the model."""
        return self.line.tickets.index(self)

    async def move(self) -> None:
        """Returns when someone before has left, or when woken."""
        await self.moved.wait()
        self.moved.clear()

    def leave(self) -> None:
        """Whoever stands behind moves up."""
        place = self.place
        del self.line.tickets[place]
        for ticket in self.line.tickets[place:]:
            ticket.moved.set()
