//! Changed seeds for short runs: what a mutation engine does, without coverage and the same every time.

/// A generator of changes (xorshift64*): its whole state is its seed.
#[derive(Clone, Debug)]
pub struct Changes {
    state: u64,
}

/// Pieces that syntax is made of; random bytes hardly ever spell one.
const WORDS: [&str; 24] = [
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "18446744073709551615",
    "[]",
    "{}",
    "[[[[",
    "\"",
    "\\u0000",
    "\\ud800",
    "{{",
    "}}",
    "{%",
    "%}",
    "messages",
    "\u{0}",
    "ﷺ",
    "é",
    ":",
    ",",
    "\n",
    "  ",
];

impl Changes {
    /// A generator; equal seeds give equal changes.
    pub fn new(seed: u64) -> Self {
        Self { state: seed | 1 }
    }

    fn next(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, count: usize) -> usize {
        (self.next() % count.max(1) as u64) as usize
    }

    /// One of the seeds with up to eight changes, at most `longest` bytes.
    pub fn of(&mut self, seeds: &[Vec<u8>], longest: usize) -> Vec<u8> {
        let chosen = self.below(seeds.len());
        let mut bytes = seeds[chosen].clone();
        for _ in 0..=self.below(8) {
            self.change(&mut bytes, seeds);
        }
        bytes.truncate(longest);
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        let at = self.below(bytes.len() + 1);
        let end = (at + 1 + self.below(16)).min(bytes.len());
        match self.below(8) {
            0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
            1 if at < bytes.len() => bytes[at] = self.next() as u8,
            2 => bytes.insert(at, self.next() as u8),
            3 if at < end => drop(bytes.drain(at..end)),
            4 if at < end => {
                let copy = bytes[at..end].to_vec();
                let to = self.below(bytes.len() + 1);
                bytes.splice(to..to, copy);
            }
            5 => bytes.truncate(at),
            6 => {
                let word = WORDS[self.below(WORDS.len())];
                bytes.splice(at..at, word.bytes());
            }
            _ => {
                let other = &seeds[self.below(seeds.len())];
                let from = self.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
        }
    }
}
