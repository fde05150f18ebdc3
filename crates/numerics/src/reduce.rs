//! Sums in the 16-lane order.
//!
//! Element `i` belongs to lane `i mod 16`; a lane adds its elements in ascending order by FMA, starting
//! at +0; the lanes are then added as a tree: 8 and 8, 4 and 4, 2 and 2, 1 and 1. The input counts as
//! padded with zeros to a multiple of 16. One AVX-512 register or two AVX2 registers hold the lanes, so
//! every width gives the same bits.

/// Lanes of a sum.
pub const LANES: usize = 16;

/// The tree over 16 lanes: `l[i] + l[i + 8]`, then `+ 4`, `+ 2`, `+ 1`.
#[inline]
pub fn tree(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Inner product of two rows of equal length.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let padded = a.len().min(b.len()).next_multiple_of(LANES);
    for i in 0..padded {
        let x = a.get(i).copied().unwrap_or(0.0);
        let y = b.get(i).copied().unwrap_or(0.0);
        lanes[i % LANES] = x.mul_add(y, lanes[i % LANES]);
    }
    tree(lanes)
}

/// Sum of squares.
pub fn sum_squares(x: &[f32]) -> f32 {
    dot(x, x)
}

/// Sum: each lane adds its elements in ascending order, then the tree.
pub fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    for (i, value) in x.iter().enumerate() {
        lanes[i % LANES] += value;
    }
    tree(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tree_adds_the_halves_first() {
        // 1e8 absorbs a lone 1, so the order shows: lanes 0 and 8 cancel before lane 1 is added.
        let mut lanes = [0.0; LANES];
        (lanes[0], lanes[8], lanes[1]) = (1e8, -1e8, 1.0);
        assert_eq!(tree(lanes), 1.0);
        let mut lanes = [0.0; LANES];
        (lanes[0], lanes[1], lanes[2]) = (1e8, 1.0, -1e8);
        assert_eq!(tree(lanes), 1.0, "2 and 0 meet before 1");
        let mut lanes = [0.0; LANES];
        (lanes[0], lanes[4], lanes[2]) = (1e8, 1.0, -1e8);
        assert_eq!(tree(lanes), 0.0, "4 and 0 meet before 2");
    }

    #[test]
    fn ragged_lengths_equal_zero_padding() {
        for len in 0..40 {
            let a: Vec<f32> = (0..len).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: Vec<f32> = (0..len).map(|i| (i as f32 * 1.3).cos()).collect();
            let mut padded = (a.clone(), b.clone());
            padded.0.resize(48, 0.0);
            padded.1.resize(48, 0.0);
            assert_eq!(dot(&a, &b).to_bits(), dot(&padded.0, &padded.1).to_bits());
            let exact: f64 = a.iter().zip(&b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
            assert!((f64::from(dot(&a, &b)) - exact).abs() < 1e-5);
            let exact: f64 = a.iter().map(|x| f64::from(*x)).sum();
            assert!((f64::from(sum(&a)) - exact).abs() < 1e-5);
        }
    }
}
