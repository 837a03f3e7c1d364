"""Real tasks for measuring how much of a reply can be guessed: texts written for this benchmark, and what is asked."""

from __future__ import annotations

HARBOUR = """\
The old harbour of Lindvik had been closed for eleven years when the town council voted to open it again. The decision
was not an easy one. The quay walls had cracked in the winter storms of 2012, the crane had been sold for scrap, and
the fish hall had become a place where pigeons nested and teenagers smoked. The council's engineers estimated that
repairing the quay would cost four million crowns, and that the dredging of the channel would cost another two
million. Against this stood the hope that the ferry from Ostra would stop in Lindvik again. The ferry company had
promised a daily service from May to September, on the condition that the water at the quay was at least five metres
deep. A study by the university said that the ferry would bring thirty thousand visitors a year, and that each of them
would spend an average of two hundred crowns in the town. The shopkeepers of the main street were in favour. The bird
society was not: a colony of arctic terns had settled on the broken breakwater, and the society feared that the
dredging would drive them away. In the end the council found a compromise. The quay would be repaired, the channel
would be dredged in the autumn, when the terns were gone, and the breakwater would be left as it was. The vote was
nine to four. Work will begin in October, and the mayor, Karin Holm, said that she hoped to welcome the first ferry in
May of next year. "A town with a harbour that is closed is like a house with a door that is nailed shut," she said.
The bird society said that it would watch the work closely, and that it would count the terns every spring."""

HONEY = """\
Honey is one of the few foods that hardly ever spoils. Pots of honey that were three thousand years old have been
found in Egyptian tombs, and the honey in them could still be eaten. There are several reasons for this. The first is
that honey contains very little water. Nectar, from which bees make honey, is about seventy per cent water, but the
bees dry it by fanning it with their wings until only about eighteen per cent is left. Bacteria and moulds need water
to live, and in honey they cannot find enough of it. The second reason is that honey is acid. Its pH is between three
and four and a half, and few bacteria can stand that. The third reason is an enzyme from the stomach of the bee, which
is called glucose oxidase. When the bees bring up the nectar, the enzyme is mixed with it, and it breaks glucose down
into gluconic acid and hydrogen peroxide. Hydrogen peroxide kills bacteria, and for this reason honey was used on
wounds for thousands of years. Honey does change as it gets older, however. It gets darker, it loses some of its
aroma, and most kinds of honey turn solid after some months, because the glucose in them forms crystals. This does no
harm, and a jar of solid honey becomes liquid again when it is put into warm water. Honey spoils only when water gets
into it: then yeasts begin to grow, and the honey ferments. For this reason a jar of honey should always be kept
closed. Honey should not be given to children who are younger than one year, because it may contain spores of a
bacterium that an adult's stomach kills and a baby's does not."""

MINUTES = """\
Minutes of the meeting of the allotment society, 14 March. Present: Anna Berg (chair), Tom Reyes (treasurer), Lucia
Marsh (secretary), Paul Okafor, Mina Sato, and twelve members. Item 1: the water bill. Tom Reyes reported that the
water bill for last year was 1,840 pounds, which is 600 pounds more than in the year before. The reason is a leak in
the pipe beside plot 17, which was found in September. Paul Okafor has repaired the pipe. The members agreed to buy a
second water meter, so that a leak is found earlier. Item 2: the bees. Mina Sato asked whether she may keep two hives
on plot 31. Two members were worried about children who play near that plot. It was agreed that the hives may be kept
behind the tool shed, at least fifteen metres from the path, for one year, and that the question will be looked at
again next March. Item 3: the fence. The fence on the north side was damaged in the storm of 2 February. A new fence
would cost 2,300 pounds. Tom Reyes said that the society has 3,100 pounds in the bank. The members voted for repairing
the old fence, which will cost about 700 pounds, by eleven votes to six. Lucia Marsh will ask three companies for
their prices. Item 4: the summer party. The party will be on 21 June. Anna Berg will ask the school whether its band
can play. Every member is asked to bring a salad or a cake. Item 5: the waiting list. There are now 43 people on the
waiting list, and the first of them has waited for three years. It was agreed that plots which have not been worked
for a whole season will be given to the next person on the list, after two letters to the member. The next meeting
will be on 9 May at seven in the evening, in the library."""

BASKET = """\
class Basket:     def __init__(self, owner):         self.owner = owner         self.items = []      def add(self,
name, price, count=1):         if price < 0:             raise ValueError("price is negative")
self.items.append({"name": name, "price": price, "count": count})      def remove(self, name):         self.items =
[item for item in self.items if item["name"] != name]      def total(self):         result = 0         for item in
self.items:             result += item["price"] * item["count"]         return result      def discount(self,
percent):         for item in self.items:             item["price"] = item["price"] * (100 - percent) / 100      def
print_bill(self):         print("Bill for", self.owner)         for item in self.items:
print(item["name"], item["count"], item["price"])         print("Total:", self.total())"""

READER = """\
import csv   def read_rows(path):     rows = []     with open(path) as file:         reader = csv.reader(file)
header = next(reader)         for row in reader:             rows.append(dict(zip(header, row)))     return rows   def
average(rows, column):     values = [float(row[column]) for row in rows if row[column] != ""]     if not values:
return None     return sum(values) / len(values)   def largest(rows, column):     best = None     for row in rows:
if row[column] == "":             continue         value = float(row[column])         if best is None or value >
float(best[column]):             best = row     return best   def write_rows(path, rows):     if not rows:
return     with open(path, "w") as file:         writer = csv.DictWriter(file, rows[0].keys())
writer.writeheader()         for row in rows:             writer.writerow(row)"""

QUEUE = """\
function createQueue(limit) {   const waiting = [];   let running = 0;    function next() {     if (running >= limit
|| waiting.length === 0) {       return;     }     const job = waiting.shift();     running += 1;     job.task()
.then((value) => job.resolve(value))       .catch((error) => job.reject(error))       .finally(() => {         running
-= 1;         next();       });   }    function add(task) {     return new Promise((resolve, reject) => {
waiting.push({ task, resolve, reject });       next();     });   }    function size() {     return waiting.length +
running;   }    return { add, size }; }"""


def _summary(text: str) -> str:
    return f"Summarise the following text, keeping to its own words where you can.\n\n{text}"


def _rename(code: str, old: str, new: str) -> str:
    return f"Rename `{old}` to `{new}` in this code and print the whole code again:\n\n```\n{code}```"


def _quotes(text: str, subject: str) -> str:
    return f"{text}\n\nWhich sentences of this text are about {subject}? Quote them word for word."


# kind of task -> questions to the model, each a chat of its own
TASKS: dict[str, tuple[str, ...]] = {
    "summarise": (_summary(HARBOUR), _summary(HONEY), _summary(MINUTES)),
    "edit code": (
        _rename(BASKET, "total", "sum_of_prices"),
        _rename(READER, "largest", "find_largest"),
        _rename(QUEUE, "size", "countJobs"),
    ),
    "quotes": (_quotes(HARBOUR, "the bird society"), _quotes(HONEY, "water"), _quotes(MINUTES, "the fence")),
    "free chat": (
        "What should I see on a first visit to Lisbon, and how many days do I need?",
        "Tell me a short story about a lighthouse keeper who finds a letter.",
        "Explain to a ten-year-old why the sky is blue.",
    ),
}
