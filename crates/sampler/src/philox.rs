//! Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw ("Parallel random
//! numbers: as easy as 1, 2, 3", 2011).
//!
//! Each block of output is a function of a counter and a key: there is no state to carry, to lose or
//! to share, and the number of position 1,000 costs as much as that of position 0.

use cadre_types::Position;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// Added to the key after each round: the golden ratio and the square root of 3, less 1, in 32 bits.
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// The counter word that keeps independent uses of one (seed, position) apart. The choice of a token
/// is use 0; a later use takes the next number.
const TOKEN_STREAM: u32 = 0;

/// One block of 128 random bits.
pub fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..ROUNDS {
        if round > 0 {
            key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
        }
        let (high_0, low_0) = wide_product(MULTIPLIERS[0], counter[0]);
        let (high_1, low_1) = wide_product(MULTIPLIERS[1], counter[2]);
        counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0];
    }
    counter
}

/// The 64 random bits of a position: words 0 (low) and 1 (high) of the block with counter
/// `[position, 0, stream, 0]` and the seed as key, low word first.
pub fn random_bits(seed: u64, position: Position) -> u64 {
    let key = [seed as u32, (seed >> 32) as u32];
    let block = philox4x32_10([position, 0, TOKEN_STREAM, 0], key);
    u64::from(block[0]) | u64::from(block[1]) << 32
}

fn wide_product(a: u32, b: u32) -> (u32, u32) {
    let product = u64::from(a) * u64::from(b);
    ((product >> 32) as u32, product as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the authors publish with Random123 (`kat_vectors`, philox4x32 10).
    #[test]
    fn known_answers() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            // Digits of pi.
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox4x32_10(counter, key), expected, "{counter:08x?} {key:08x?}");
        }
    }

    #[test]
    fn bits_of_a_position_are_the_low_words_of_its_block() {
        assert_eq!(random_bits(0, 0), 0xe169_c58d_6627_e8d5);
        let block = philox4x32_10([7, 0, 0, 0], [0x89ab_cdef, 0x0123_4567]);
        let bits = random_bits(0x0123_4567_89ab_cdef, 7);
        assert_eq!([bits as u32, (bits >> 32) as u32], block[..2]);
    }

    #[test]
    fn every_bit_of_seed_and_position_matters() {
        let base = random_bits(0x1234_5678_9abc_def0, 1000);
        for bit in 0..64 {
            assert_ne!(random_bits(0x1234_5678_9abc_def0 ^ 1 << bit, 1000), base);
        }
        for bit in 0..32 {
            assert_ne!(random_bits(0x1234_5678_9abc_def0, 1000 ^ 1 << bit), base);
        }
    }
}
